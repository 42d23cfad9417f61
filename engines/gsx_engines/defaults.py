"""What building and serving take where nothing else is given.

Nothing is imported here, so that a help text shows these numbers without loading a runtime.
"""

# Columns of an engine's K/V buffers: longer contexts are rare, and the buffers are as long as its capacity.
BUILD_CONTEXT = 4096
# Requests that a served model works on at once, and those that wait.
SERVED_REQUESTS, WAITING_REQUESTS = 8, 64
