"""`python -m kamado` is the command `kamado`."""

from kamado.cli import main

if __name__ == "__main__":
    main()
