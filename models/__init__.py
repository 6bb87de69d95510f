"""Model definitions written with shardtrain, exactly as a user would write their own."""

if __name__ == "models":
    raise ImportError("this folder is not the package `models`: import `shardtrain.models` instead")
