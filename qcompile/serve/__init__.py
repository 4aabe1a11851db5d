"""An HTTP server with OpenAI's interface over one compiled model.

The engine runs in a thread of its own (`engine_thread`); the event loop only reads requests (`requests`), queues
them (`admission`, `generation`) and writes what comes back (`chat_replies`, `text_replies`, `event_stream`). Needs
the extra [serve].
"""
