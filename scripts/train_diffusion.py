"""Train a diffusion model: ``accelerate launch scripts/train_diffusion.py CONFIG [key=value ...]``.

The same as ``mmalign run CONFIG ...``, for launchers that take a script; methods of another modality are refused::

    accelerate launch --num_processes 4 scripts/train_diffusion.py configs/diffusion/ddpo.yaml steps=200
"""

from mmalign.cli import train_script

if __name__ == "__main__":
    train_script("diffusion")
