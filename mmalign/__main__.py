"""``python -m mmalign``: what ``accelerate launch -m mmalign run ...`` starts on every process."""

from mmalign.cli import main

if __name__ == "__main__":
    main()
