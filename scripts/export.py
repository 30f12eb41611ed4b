"""Export a trained model: ``python scripts/export.py MODEL OUTPUT [key=value ...]``, the same as ``mmalign export``.

    python scripts/export.py runs/sft/model exported --kind merged
"""

from mmalign.cli import run_command

if __name__ == "__main__":
    run_command("export")
