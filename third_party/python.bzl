# SPDX-License-Identifier: Apache-2.0
"""What the build asks the configured Python for: the wheels' files, and the rows of the table."""

_BUILD = """
package(default_visibility = ["//visibility:public"])

cc_library(
    name = "ffi_headers",
    hdrs = glob(["include/xla/ffi/api/*.h"]),
    # As -isystem: warnings in XLA's headers aren't ours.
    includes = ["include"],
)

cc_import(name = "cudart_static", static_library = "libcudart_static.a")

cc_import(name = "dsl_runtime", static_library = "libcuda_dialect_runtime_static.a")
"""

# Row -> the files that its object depends on. Imports what `kernels/build.py` imports: no JAX.
_ROWS = """
import json
from kernels import build
def sources(row):
    module = build.entry_point(row).partition(":")[0]
    return {*build.source_files(module), *build.source_files("kernels.build")}
print(json.dumps({
    row.name: sorted(str(path.relative_to(build.ROOT)) for path in sources(row))
    for row in build.VARIANTS
}))
"""

def _label(path):
    package, _, name = path.partition("/")
    return "//%s:%s" % (package, name)

def _ask(rctx, python, *arguments):
    result = rctx.execute(
        [python, "-B"] + list(arguments),
        working_directory = str(rctx.path(Label("@fa4_jax//:WORKSPACE")).dirname),
    )
    if result.return_code:
        fail("%s\nPYTHON_BIN_PATH names the Python to use; now it is %s" % (result.stderr, python))
    return result.stdout.strip()

def _python_repository_impl(rctx):
    python = rctx.os.environ.get("PYTHON_BIN_PATH") or str(rctx.which("python3"))
    cuda = rctx.os.environ.get("FA4_JAX_CUDA", "13")

    lines = _ask(rctx, python, "-m", "kernels.toolchain", "--cuda", cuda).splitlines()
    files = dict([line.split("=", 1) for line in lines])
    rctx.symlink(files["FFI_HEADERS"], "include")
    for archive in (files["CUDART_STATIC"], files["DSL_RUNTIME"]):
        rctx.symlink(archive, archive.rpartition("/")[2])

    rows = json.decode(_ask(rctx, python, "-c", _ROWS))
    rows = {row: [_label(path) for path in paths] for row, paths in rows.items()}
    rctx.file("BUILD.bazel", _BUILD)
    rctx.file("defs.bzl", "PYTHON = %r\nCUDA = %r\nROWS = %r\n" % (python, cuda, rows))

    # Asked again when one of these changes.
    for label in depset([label for labels in rows.values() for label in labels]).to_list():
        rctx.path(Label("@fa4_jax" + label))

python_repository = repository_rule(
    implementation = _python_repository_impl,
    environ = ["FA4_JAX_CUDA", "PYTHON_BIN_PATH"],
    # Asked again by every new Bazel server: wheels come and go.
    local = True,
)
