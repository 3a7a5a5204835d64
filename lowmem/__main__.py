"""`python -m lowmem`: the same as the command `lowmem`."""

from lowmem.cli import main

if __name__ == "__main__":
    main()
