//! [`Lengths`]: how many tokens a prompt or a completion has.

use std::fmt;
use std::str::FromStr;

use rand::{Rng, RngExt};
use rand_distr::{Distribution, LogNormal};

/// A distribution of token counts; every draw is at least 1.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Lengths {
    /// Always the same.
    Fixed(u32),
    /// Each from the first to the last equally often.
    Uniform(u32, u32),
    /// Logarithms are normal about that of the median: many short ones, few long ones.
    LogNormal {
        /// Half of all draws are shorter.
        median: f64,
        /// Standard deviation of the natural logarithm.
        sigma: f64,
    },
}

impl Lengths {
    /// Draws one.
    pub fn draw(&self, rng: &mut impl Rng) -> u32 {
        match *self {
            Self::Fixed(tokens) => tokens,
            Self::Uniform(low, high) => rng.random_range(low..=high),
            Self::LogNormal { median, sigma } => {
                let lengths =
                    LogNormal::new(median.ln(), sigma).expect("parsed lengths are in range");
                // The conversion saturates; a request's length is cut to the context anyway.
                lengths.sample(rng).round().max(1.0) as u32
            }
        }
    }
}

impl FromStr for Lengths {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (kind, values) = text.split_once(':').unwrap_or(("fixed", text));
        let numbers: Result<Vec<f64>, _> = values.split(',').map(str::parse::<f64>).collect();
        let numbers = numbers.map_err(|_| format!("{values} holds something else than numbers"))?;
        let count = |value: f64| {
            let in_range = value.fract() == 0.0 && (1.0..=1e9).contains(&value);
            in_range
                .then_some(value as u32)
                .ok_or_else(|| format!("{value} is no count of tokens"))
        };
        match (kind, numbers.as_slice()) {
            ("fixed", &[tokens]) => Ok(Self::Fixed(count(tokens)?)),
            ("uniform", &[low, high]) if low <= high => {
                Ok(Self::Uniform(count(low)?, count(high)?))
            }
            ("lognormal", &[median, sigma])
                if (1.0..=1e9).contains(&median) && (0.0..=10.0).contains(&sigma) =>
            {
                Ok(Self::LogNormal { median, sigma })
            }
            _ => Err("lengths are N, uniform:LOW,HIGH or lognormal:MEDIAN,SIGMA".to_owned()),
        }
    }
}

impl fmt::Display for Lengths {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Fixed(tokens) => write!(f, "{tokens}"),
            Self::Uniform(low, high) => write!(f, "uniform:{low},{high}"),
            Self::LogNormal { median, sigma } => write!(f, "lognormal:{median},{sigma}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::SeedableRng;
    use rand::rngs::StdRng;

    fn draws(text: &str) -> Vec<u32> {
        let lengths: Lengths = text.parse().unwrap();
        assert_eq!(lengths.to_string(), text);
        let mut rng = StdRng::seed_from_u64(3);
        let mut draws: Vec<u32> = (0..9_999).map(|_| lengths.draw(&mut rng)).collect();
        draws.sort_unstable();
        draws
    }

    #[test]
    fn draws_follow_their_distribution() {
        assert!(draws("17").iter().all(|&tokens| tokens == 17));
        let uniform = draws("uniform:10,30");
        assert_eq!((uniform[0], uniform[9_998]), (10, 30));
        assert!(uniform[4_999].abs_diff(20) <= 1, "{}", uniform[4_999]);
        let skewed = draws("lognormal:200,1");
        assert!(skewed[4_999].abs_diff(200) < 10, "{}", skewed[4_999]);
        // One standard deviation up is a factor of e.
        assert!(skewed[8_412].abs_diff(544) < 40, "{}", skewed[8_412]);
        assert!(skewed[0] >= 1);
    }

    #[test]
    fn nonsense_is_refused() {
        for text in [
            "",
            "0",
            "1.5",
            "-3",
            "nan",
            "many",
            "uniform:5",
            "uniform:9,3",
            "uniform:0,3",
            "lognormal:0.1,1",
            "lognormal:100,nan",
            "zipf:2",
            "fixed:1,2",
        ] {
            assert!(text.parse::<Lengths>().is_err(), "{text}");
        }
    }
}
