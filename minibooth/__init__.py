"""minibooth: DreamBooth for Stable Diffusion (arXiv 2208.12242) in pure PyTorch.

Floors, from the ground: models, checkpoint, diffusion, dreambooth, and the commands (python -m minibooth.<command>).
"""

import signal
import sys

if sys.argv[:1] == ["-m"] and signal.getsignal(signal.SIGINT) == signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until `command.run`, Ctrl-C ends a command without a page on its imports

from minibooth.diffusion import load as load
from minibooth.diffusion.samplers import sample as sample
from minibooth.diffusion.scheduler import DDPMScheduler as DDPMScheduler
from minibooth.dreambooth.objective import dreambooth_loss as dreambooth_loss
