"""The way between the web's process and the engine's: typed messages over a socket that the two share."""
