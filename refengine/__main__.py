"""``python -m refengine``: the same as the ``refengine`` command."""

from refengine.cli.main import main

if __name__ == "__main__":
    main()
