"""The stages that make and judge data, one module each; every module of this package registers its kind."""
