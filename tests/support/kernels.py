"""Where Triton's kernels run in a test, and where they cannot."""

from __future__ import annotations

from importlib.metadata import version

import numpy as np
import pytest
import torch

# without a GPU the kernels run in Triton's interpreter (see conftest)
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
RUNS_KERNELS = [
    pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning"),  # triton 3.6
    pytest.mark.skipif(
        not torch.cuda.is_available()
        and version("triton") < "3.7"
        and np.lib.NumpyVersion(np.__version__) >= "2.4.0",
        reason="this triton's interpreter does not know this numpy",
    ),
]
