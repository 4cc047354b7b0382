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
# An editable install would come before this folder.
"$python" -c 'import fa4_jax, os, sys; sys.exit(
    None if fa4_jax.__file__.startswith(os.getcwd()) else f"{fa4_jax.__file__} would be tested")'
exec "$python" -m pytest -p no:cacheprovider --junitxml="$XML_OUTPUT_FILE" "$@"
