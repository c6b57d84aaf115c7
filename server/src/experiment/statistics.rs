//! The little statistics that the reading needs.

/// Mean and spread of some values.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Spread {
    /// Their mean.
    pub mean: f64,
    /// Their standard deviation (of a sample: n - 1); 0 of a single one.
    pub sd: f64,
    /// How many.
    pub n: usize,
}

/// 97.5 % quantiles of Student's t by degrees of freedom, from 1.
const T: [f64; 30] = [
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131, 2.120,
    2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
];

impl Spread {
    /// None of nothing.
    pub fn of(values: &[f64]) -> Option<Self> {
        let n = values.len();
        if n == 0 {
            return None;
        }
        let mean = values.iter().sum::<f64>() / n as f64;
        let squares: f64 = values.iter().map(|v| (v - mean).powi(2)).sum();
        Some(Self { mean, sd: (squares / (n - 1).max(1) as f64).sqrt(), n })
    }

    /// Half the width of the 95 % interval of the mean; none of a single value.
    pub fn half_width(&self) -> Option<f64> {
        let freedom = self.n.checked_sub(1).filter(|f| *f > 0)?;
        // Beyond the table a fit to it, within 0.003.
        let t = T.get(freedom - 1).copied().unwrap_or(1.96 + 2.4 / freedom as f64);
        Some(t * self.sd / (self.n as f64).sqrt())
    }

    /// What the 95 % interval says about the sign of the mean.
    pub fn verdict(&self) -> Verdict {
        match self.half_width() {
            Some(half) if self.mean - half > 0.0 => Verdict::Better,
            Some(half) if self.mean + half < 0.0 => Verdict::Worse,
            _ => Verdict::Open,
        }
    }
}

/// Where a mean difference lies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// Above 0.
    Better,
    /// Below 0.
    Worse,
    /// Either.
    Open,
}

impl Verdict {
    /// In words.
    pub fn words(self) -> &'static str {
        match self {
            Self::Better => "better than",
            Self::Worse => "worse than",
            Self::Open => "not distinguishable from",
        }
    }
}

/// Two-sided sign test: how probable so lopsided a count would be, were both signs alike.
pub fn sign_test(above: usize, below: usize) -> f64 {
    let n = above + below;
    let tail = above.min(below);
    let (mut term, mut sum) = (0.5f64.powi(n as i32), 0.0);
    for k in 0..=tail {
        sum += term;
        term *= (n - k) as f64 / (k + 1) as f64;
    }
    (2.0 * sum).min(1.0)
}

/// Pearson's correlation; none where one side does not vary.
pub fn correlation(pairs: &[(f64, f64)]) -> Option<f64> {
    let n = pairs.len() as f64;
    let mean = |of: fn(&(f64, f64)) -> f64| pairs.iter().map(of).sum::<f64>() / n;
    let (mx, my) = (mean(|p| p.0), mean(|p| p.1));
    let sum = |of: &dyn Fn(f64, f64) -> f64| pairs.iter().map(|(x, y)| of(x - mx, y - my)).sum::<f64>();
    let (xy, xx, yy) = (sum(&|x, y| x * y), sum(&|x, _| x * x), sum(&|_, y| y * y));
    let r = xy / (xx * yy).sqrt();
    r.is_finite().then_some(r)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spreads_by_hand() {
        let s = Spread::of(&[1.0, 2.0, 3.0]).unwrap();
        assert_eq!((s.mean, s.sd, s.n), (2.0, 1.0, 3));
        assert!((s.half_width().unwrap() - 4.303 / 3f64.sqrt()).abs() < 1e-9);
        assert_eq!(Spread::of(&[5.0]).unwrap(), Spread { mean: 5.0, sd: 0.0, n: 1 });
        assert_eq!((Spread::of(&[]), Spread::of(&[5.0]).unwrap().half_width()), (None, None));
        let wide = Spread { mean: 0.0, sd: 1.0, n: 61 };
        assert!((wide.half_width().unwrap() * 61f64.sqrt() - 2.0).abs() < 3e-3);
    }

    #[test]
    fn verdicts_need_an_interval_on_one_side() {
        let of = |values: &[f64]| Spread::of(values).unwrap().verdict();
        assert_eq!(
            [of(&[1.0, 1.1, 0.9]), of(&[-1.0, -1.1, -0.9]), of(&[1.0, -1.1, 0.9])].map(Verdict::words),
            ["better than", "worse than", "not distinguishable from"]
        );
        assert_eq!(of(&[3.0]), Verdict::Open);
    }

    #[test]
    fn signs_and_correlations_by_hand() {
        assert_eq!([sign_test(0, 0), sign_test(3, 0), sign_test(2, 2)], [1.0, 0.25, 1.0]);
        assert!((sign_test(1, 4) - 0.375).abs() < 1e-12);
        assert!((correlation(&[(1.0, 2.0), (2.0, 4.0), (3.0, 6.0)]).unwrap() - 1.0).abs() < 1e-12);
        assert!((correlation(&[(1.0, 1.0), (2.0, -1.0), (3.0, 1.0)]).unwrap()).abs() < 1e-12);
        assert_eq!((correlation(&[(1.0, 2.0), (1.0, 3.0)]), correlation(&[])), (None, None));
    }
}
