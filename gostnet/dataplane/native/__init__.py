"""The native relay: flows that live on are moved by a C thread. Optional: without it everything works, slower."""
