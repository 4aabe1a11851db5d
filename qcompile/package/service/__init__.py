"""What a ModelArts package carries beside the runtime: requests read, answered within a limit, and a small server.

In a package this folder is `qcompile_service`. It is written for Python 3.9 and imports the standard library and the
runtime. The OpenAI-compatible server is `qcompile serve`; this one speaks ModelArts' plain `POST /` only.
"""
