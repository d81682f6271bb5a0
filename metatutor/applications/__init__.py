"""Where else learning from little helps: people's tastes, actions, pictures."""
