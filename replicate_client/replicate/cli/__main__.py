"""`python -m replicate.cli`: the command line where its script is not on the path."""

from replicate.cli.main import main

if __name__ == "__main__":
    main()
