"""`python -m pack_ptq`."""

from pack_ptq.cli import main

if __name__ == "__main__":
    main()
