#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Usage: run_pytest.sh PYTHON ARGUMENT...     (Bazel's tests, from their runfiles)
# Runs pytest on a copy of the runfiles: these are links, and whoever resolves one is in the checkout,
# where the library that Bazel built isn't.
set -euo pipefail

python=$1
shift
copy=$TEST_TMPDIR/fa4_jax
cp -rL . "$copy"
cd "$copy"
export HOME=$TEST_TMPDIR
# An editable install would come before this folder, and tests of a missing library are skipped.
"$python" - <<'END'
import os
from fa4_jax import _ffi
library = str(_ffi.library_path())
assert os.path.isfile(library) and library.startswith(os.getcwd()), f"{library} would be tested"
END
exec "$python" -m pytest -p no:cacheprovider --junitxml="$XML_OUTPUT_FILE" "$@"
