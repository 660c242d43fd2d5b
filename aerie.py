"""Aerie: an inference server for Llama models with EAGLE speculative decoding."""

import sys

# The source's `python -m aerie`. In the installed package, both __init__.py and __main__.py
# (setup.py).


def main() -> None:
    """The command `aerie`."""
    from server.cli import main as run

    run()


def ray(arguments: dict[str, str]) -> object:
    """For Ray Serve: `serve run aerie:ray config=smollm2 replicas=2`."""
    from server.ray.app import build

    return build(arguments)


def syncspec() -> None:
    """The command `syncspec`, a system of its own, which needs an extra."""
    try:
        from syncspec.cli import main as run

        run()
    except ModuleNotFoundError as error:
        library = str(error.name).partition(".")[0]
        print(f"error: {library} is missing: pip install 'aerie[syncspec]'", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
