"""The graph passes, one a file: each takes the graph from one stage to the next."""

if __name__ != "fxquant.passes":
    raise ImportError(
        f"{__name__!r} is a link into the package, for reading and editing: "
        "import 'fxquant.passes' instead",
        name=__name__,
    )
