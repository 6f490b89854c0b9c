"""Programs: a converted model's calls of operators, recorded once and then run without Python.

A call of an operator from Python costs several microseconds before anything is computed, and a
lowered graph is some hundred of them. For inputs of the same types, shapes and layouts they are the
same calls every time, so they are recorded once (``recorder``), written as a graph of TorchScript's
interpreter (``script``), and run by that from then on (``programs``). The kernels are the same, and
so are their results, bit for bit.

``trusted`` says which graphs compute with torch's operators only, ``signature`` what inputs have
to agree in, and ``watch`` whether a model is still the one that was recorded. Wherever one of them
says no, the model runs as its graph stands.
"""
