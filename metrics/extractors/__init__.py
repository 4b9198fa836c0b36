"""Networks that turn images and texts into feature rows. Import what you need from its module; nothing is loaded here."""
