"""Where in the target a draft head reads hidden states. Imports no torch.

A place k from 0 to num_layers - 1 is the stream before layer k, which is the output of layer k - 1;
num_layers is the output of the final norm.
"""

LAST_OUTPUT = -1  # the stream after the last layer, before the final norm
