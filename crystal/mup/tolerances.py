"""How far a measured exponent or value may lie from what the rules say: each verdict's tolerance, with its reason.

Audits read exponents off meta tensors, where only rounded shapes disturb them. Coordinate checks measure models of
widths in the hundreds, whose activations approach their limit from below as width^-1/2: over 60 correct checks their
slopes went down to -0.40 (docs/mup.md). A wrong power of width is off by 0.5 or more.
"""

AUDIT_EXPONENT = 0.02  # d_ff and the like are rounded to whole numbers
AUDIT_VALUE = 1e-6  # relative, of values against a plan's: both come from the same formulas
MEASURED_INIT = 0.15  # exponent: an initial size that was drawn, not read, must be known better than this
AUDIT_TWICE = 0.1  # a branch's exponent beyond this is a multiplier that counts depth, when the reason is looked for

INIT_AND_UPDATE = 0.1  # of tensors: they do not depend on training, and correct models stay within 0.01
SGD_UPDATE = 0.4  # the same for SGD's updates, which are as large as gradients are, and noisy like them
FEW_ELEMENTS = 0.3  # the same for the init of a tensor of few elements
FEW = 2048  # elements, below which a tensor's initial size is known to less than 2%
ACTIVATION = 0.35  # of what training does to activations
PUSH = 0.4  # of the effect of the first update, which is noisier
FINITE_WIDTH = -0.35  # how far below 0 counts as 0 for activations after updates
FADING = -1.0  # the same where a map to a fixed size inside the model starts as width^-1/2, and what follows with it
OUTPUT_OR_DEPTH = -0.5  # the same for logits, and for all that is measured over depth

HIGH_LR = 0.25  # first updates beyond this share of the init are not small any more; correct models stop being flat
LOW_LR = 1e-5  # below this share their effects drown in fp32's rounding

SAME_POWER = 0.2  # how close to a known wrong power an exponent lies whose reason is named

MAX_SHIFT = 0.5  # octaves that the best lr may move from the narrowest width to the widest
MAX_REGRET = 0.01  # share of the loss that the narrowest's best lr may cost at the widest
