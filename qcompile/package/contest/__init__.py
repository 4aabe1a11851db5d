"""What a contest package carries beside the runtime: the loop that answers a test file before its deadline.

In the zip this folder is `qcompile_contest`. It is written for Python 3.9 and imports the standard library and the
runtime; the rung for torch_npu imports torch and transformers when it is tried.
"""
