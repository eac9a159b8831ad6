"""The channel between the web's process and the engines': typed messages over a socket pair."""
