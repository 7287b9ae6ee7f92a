"""What the chat shows and how keys are read: one interface, two terminals. Decides nothing about replies."""
