"""`python -m tinyllama` is `tinyllama`."""

from tinyllama.cli.app import main

if __name__ == "__main__":
    main()
