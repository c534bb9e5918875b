"""What every backend is held to, tested elsewhere for the native one, here for Triton.

The fixtures ``backend`` and ``any_backend`` are ``triton`` in this process (tests/conftest.py); each test asserts that
it ran.
"""

from __future__ import annotations

from tests.test_bad_input import (  # noqa: F401
    test_a_dtype_that_the_backend_does_not_have,
    test_inputs_of_another_dtype_than_the_parameters,
    test_inputs_on_another_device_than_the_parameters,
    test_the_functional_form_calls_the_target_query,
    test_the_module_names_what_is_wrong,
    test_the_modules_own_size_is_named_for_inputs_of_another,
)
from tests.test_ops import (  # noqa: F401
    test_any_small_case,
    test_any_subset_of_the_gradients_has_the_same_bits,
    test_double_backward_raises,
    test_gradients_accumulate,
    test_opcheck,
    test_without_grad_nothing_is_saved,
)
