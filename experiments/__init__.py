"""The command lines.

Merging alternates between the threads of torch and those of SciPy's BLAS. By default torch's keep
a core busy for milliseconds while they wait, which takes it from the other; here they sleep at
once. Read when torch is loaded, hence here; a setting of yours is kept.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
