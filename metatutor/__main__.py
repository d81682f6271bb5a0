"""`python -m metatutor` is the command `metatutor`."""

from metatutor.cli import main

if __name__ == "__main__":
    main()
