"""python -m trainer, which is also what torchrun runs."""

import sys

from trainer.errors import INTERRUPTED

if __name__ == "__main__":
    try:
        from trainer.cli import main
    except KeyboardInterrupt:  # Ctrl-C before there is a command: main reports later ones
        print("interrupted", file=sys.stderr)
        sys.exit(INTERRUPTED)
    main()
