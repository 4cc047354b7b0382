# SPDX-License-Identifier: Apache-2.0
"""The native C++ rules, under the names that Bazel 4.2's own BUILD files load from rules_cc.

Debian's package of rules_cc is for another Bazel: it loads symbols that 4.2.3 doesn't have.
"""

cc_binary = native.cc_binary
cc_import = native.cc_import
cc_library = native.cc_library
cc_proto_library = native.cc_proto_library
cc_test = native.cc_test
cc_toolchain = native.cc_toolchain
cc_toolchain_suite = native.cc_toolchain_suite
objc_library = native.objc_library
