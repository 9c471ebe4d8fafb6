"""Copies to a GPU, as far as they can be tested without one."""

from __future__ import annotations

from unittest import mock

import numpy as np
import pytest
import torch

from pretrain.data.transfer import Transfer


def test_memory_that_cannot_be_pinned_leaves_no_error_to_the_training(monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA hands the error of a refused call to the next kernel that is launched."""
    cudart = mock.Mock(cudaHostRegister=mock.Mock(return_value=2))
    launch = mock.Mock(side_effect=RuntimeError("CUDA error: out of memory"))
    monkeypatch.setattr(torch.cuda, "Stream", mock.Mock())
    monkeypatch.setattr(torch.cuda, "cudart", lambda: cudart)
    monkeypatch.setattr(torch, "ones", launch)
    with pytest.warns(UserWarning, match="could not be pinned"):
        transfer = Transfer(torch.device("cuda"), np.zeros(8, np.uint8))
    transfer.close()
    launch.assert_called_once()
    cudart.cudaHostUnregister.assert_not_called()
