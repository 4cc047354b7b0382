# SPDX-License-Identifier: Apache-2.0
"""The native Java rules, under the names that Bazel 4.2's own BUILD files load from rules_java.

Nothing here is written in Java; Bazel describes the JDK that it runs on with them.
"""

java_binary = native.java_binary
java_import = native.java_import
java_library = native.java_library
java_package_configuration = native.java_package_configuration
java_proto_library = native.java_proto_library
java_runtime = native.java_runtime
java_test = native.java_test
java_toolchain = native.java_toolchain
