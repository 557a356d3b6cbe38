"""Network: the parts that a study switches, one folder each, and the protocol by which a layer uses them.

`part.py` is the protocol before a part is built, `layer_part.py` that of its module, `registry.py` the list of
components, `forward_context.py` the inputs of a forward pass other than activations.
"""
