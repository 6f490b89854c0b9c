"""The pattern engine: what to look for in a graph, and what to put in its place."""

if __name__ != "fxquant.patterns":
    raise ImportError(
        f"{__name__!r} is a link into the package, for reading and editing: "
        "import 'fxquant.patterns' instead",
        name=__name__,
    )
