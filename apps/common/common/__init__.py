"""What every program of this project needs: its environment, and the events that it tells."""
