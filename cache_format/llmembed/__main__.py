"""`python -m llmembed` is the command `llmembed`."""

from llmembed.cli import main

if __name__ == "__main__":
    main()
