"""``python -m routenlp_plugins``: the command line."""

from routenlp_plugins.cli import app

if __name__ == "__main__":
    app()
