"""The coordinator: a pure state machine that forms and ends generations, and the WebSocket server around it."""
