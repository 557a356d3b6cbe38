"""Network: the parts that a study switches, one folder each, and the protocol by which a layer asks them.

`part.py` is what is known of a part before it is built, `layer_part.py` what its module has, `registry.py` the list of
them, `forward_context.py` what a forward pass knows beside its activations.
"""
