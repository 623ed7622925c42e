"""python -m trainer, which is also what torchrun runs."""

from trainer.cli import main

if __name__ == "__main__":
    main()
