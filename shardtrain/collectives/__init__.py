"""What layers and steps need of the network beyond what the compiler inserts by itself."""
