"""What DreamBooth adds to a diffusion model: photographs, the class prior, the objective and the training loop."""
