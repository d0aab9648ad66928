"""Exercise 1 of 3: run it, look, and write down what you see.

Replace each None by your answer and run this: python exercises/execute.py tells what is right.
"""

from grader import grade

# python visualize_diffusion.py --figure schedules
# The table ends with where each schedule holds more noise than image. Where does the cosine one?
first_t_below_0_dB_cosine = None

# A noisy image is a sum: so much of the image, so much of the noise. How much of the image (the
# factor, not its square) is left at t = 250 of the linear schedule? Two decimals will do; the table
# has its square.
factor_of_the_image_at_250 = None

# python sample.py --sampler dpmpp_2m --guidance 1 --output_dir outputs/plain
# python sample.py --sampler dpmpp_2m --guidance 2 --output_dir outputs/guided
# How often is the network asked for each picture, by the first command and by the second? (a, b)
calls_without_and_with_guidance = None

# python sample.py --num_images 4 --seed 1 --batch_size 1 --output_dir outputs/one
# python sample.py --num_images 4 --seed 1 --batch_size 4 --output_dir outputs/four
# Is the first picture of both sheets the same digit in the same hand? True or False
the_same_picture_whatever_the_batch = None

# python visualize_model.py --figure table --channels 64 128 256
# The encoder halves the picture, so the number of places falls to a fourth from level to level. By
# which factor does the encoder's memory (the column "activation, bytes") change from its first
# level to its second?
memory_of_the_second_level_over_the_first = None

# No command, only thought. The loss is the mean squared error of the predicted noise; the noise
# that was added is a unit Gaussian. What is the loss of a network that always answers zero? And,
# at the last t of a schedule that ends in pure noise, of one that returns its input? (a, b)
loss_of_zero_and_of_the_copy = None

if __name__ == "__main__":
    grade("execute", globals())
