//! Pictures to pixel values, as CLIP's reference processor does it (Pillow bicubic, rounded to u8, centre crop).

use fast_image_resize::{FilterType, PixelType, ResizeAlg, ResizeOptions, Resizer, images::Image};
use serde::Deserialize;

/// An RGB picture, rows from the top, three bytes a pixel.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Picture {
    /// Pixels across.
    pub width: usize,
    /// Pixels down.
    pub height: usize,
    /// `height * width * 3` bytes.
    pub rgb: Vec<u8>,
}

/// Longer edge over shorter edge at most: only the centre is looked at, and all of it is resized.
const MAX_ASPECT: usize = 100;

/// Why a picture cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PictureError {
    /// Bytes and size disagree.
    #[error("a picture of {width} x {height} pixels needs {expected} bytes, it has {found}")]
    Size {
        /// Pixels across.
        width: usize,
        /// Pixels down.
        height: usize,
        /// Bytes needed.
        expected: usize,
        /// Bytes found.
        found: usize,
    },
    /// The resampler refused.
    #[error("the picture cannot be resized: {0}")]
    Resize(String),
    /// preprocessor_config.json.
    #[error("preprocessor_config.json cannot be used: {0}")]
    Config(String),
}

/// `preprocessor_config.json`, validated.
#[derive(Debug, Clone, PartialEq)]
pub struct Preprocess {
    /// The shorter edge after resizing, pixels.
    pub shortest_edge: usize,
    /// Edge of the centre crop, pixels.
    pub crop: usize,
    /// Channel means, after scaling to 0..1.
    pub mean: [f32; 3],
    /// Channel deviations.
    pub std: [f32; 3],
}

#[derive(Deserialize)]
#[serde(untagged)]
enum RawSize {
    Edge(usize),
    Named { shortest_edge: Option<usize>, height: Option<usize>, width: Option<usize> },
}

impl RawSize {
    fn edge(&self) -> Option<usize> {
        match self {
            Self::Edge(n) => Some(*n),
            Self::Named { shortest_edge: Some(n), .. } => Some(*n),
            Self::Named { height: Some(h), width: Some(w), .. } if h == w => Some(*h),
            Self::Named { .. } => None,
        }
    }
}

#[derive(Deserialize)]
struct Raw {
    size: Option<RawSize>,
    crop_size: Option<RawSize>,
    image_mean: Option<[f32; 3]>,
    image_std: Option<[f32; 3]>,
}

impl Preprocess {
    /// Read `preprocessor_config.json`; absent keys take CLIP's defaults.
    ///
    /// # Errors
    /// [`PictureError::Config`] names the key.
    pub fn from_json(json: &str) -> Result<Self, PictureError> {
        let raw: Raw = serde_json::from_str(json).map_err(|e| PictureError::Config(e.to_string()))?;
        let edge = |size: Option<RawSize>, key: &str| match size {
            None => Ok(224),
            Some(s) => s
                .edge()
                .filter(|n| (1..=4096).contains(n))
                .ok_or_else(|| PictureError::Config(format!("'{key}' must be one edge of 1 to 4096 pixels"))),
        };
        let this = Self {
            shortest_edge: edge(raw.size, "size")?,
            crop: edge(raw.crop_size, "crop_size")?,
            mean: raw.image_mean.unwrap_or([0.481_454_66, 0.457_827_5, 0.408_210_73]),
            std: raw.image_std.unwrap_or([0.268_629_55, 0.261_302_6, 0.275_777_1]),
        };
        if this.crop > this.shortest_edge {
            return Err(PictureError::Config("'crop_size' is larger than 'size'".into()));
        }
        if this.std.iter().any(|s| *s <= 0.0) {
            return Err(PictureError::Config("'image_std' must be positive".into()));
        }
        Ok(this)
    }

    /// Resize the shorter edge, crop the centre.
    ///
    /// # Errors
    /// [`PictureError`] for a picture whose bytes do not fit its size.
    pub fn resize(&self, picture: &Picture) -> Result<Picture, PictureError> {
        let (w, h) = (picture.width, picture.height);
        let expected = w * h * 3;
        if expected == 0 || picture.rgb.len() != expected {
            return Err(PictureError::Size { width: w, height: h, expected, found: picture.rgb.len() });
        }
        let (short, long) = (w.min(h), w.max(h));
        if long / short > MAX_ASPECT {
            return Err(PictureError::Resize(format!("{w} x {h} pixels are too narrow; crop it")));
        }
        let scaled = self.shortest_edge * long / short;
        let (new_w, new_h) = if w <= h { (self.shortest_edge, scaled) } else { (scaled, self.shortest_edge) };
        let resized = if (new_w, new_h) == (w, h) {
            picture.rgb.clone()
        } else {
            let fail = |e: String| PictureError::Resize(e);
            let source = Image::from_vec_u8(w as u32, h as u32, picture.rgb.clone(), PixelType::U8x3)
                .map_err(|e| fail(e.to_string()))?;
            let mut target = Image::new(new_w as u32, new_h as u32, PixelType::U8x3);
            // Catmull-Rom is the cubic with a = -0.5, Pillow's bicubic; "convolution" widens it when shrinking.
            let options = ResizeOptions::new().resize_alg(ResizeAlg::Convolution(FilterType::CatmullRom));
            Resizer::new().resize(&source, &mut target, &options).map_err(|e| fail(e.to_string()))?;
            target.into_vec()
        };
        let (left, top) = ((new_w - self.crop) / 2, (new_h - self.crop) / 2);
        let mut rgb = Vec::with_capacity(self.crop * self.crop * 3);
        for y in top..top + self.crop {
            let start = (y * new_w + left) * 3;
            rgb.extend_from_slice(&resized[start..start + self.crop * 3]);
        }
        Ok(Picture { width: self.crop, height: self.crop, rgb })
    }

    /// Pixel values of one picture, `[3, crop, crop]` row-major.
    ///
    /// # Errors
    /// As [`Self::resize`].
    pub fn pixels(&self, picture: &Picture) -> Result<Vec<f32>, PictureError> {
        let picture = self.resize(picture)?;
        let mut out = Vec::with_capacity(picture.rgb.len());
        for c in 0..3 {
            let values = picture.rgb.iter().skip(c).step_by(3);
            out.extend(values.map(|v| (f32::from(*v) / 255.0 - self.mean[c]) / self.std[c]));
        }
        Ok(out)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn preprocess() -> Preprocess {
        Preprocess::from_json(
            r#"{"size":{"shortest_edge":4},"crop_size":{"height":4,"width":4},
            "image_mean":[0.5,0.5,0.5],"image_std":[0.5,0.5,0.5]}"#,
        )
        .unwrap()
    }

    #[test]
    fn crops_the_centre_and_scales() {
        let mut picture = Picture { width: 8, height: 4, rgb: vec![0; 96] };
        for y in 0..4 {
            for x in 2..6 {
                picture.rgb[(y * 8 + x) * 3] = 255;
            }
        }
        let pixels = preprocess().pixels(&picture).unwrap();
        assert_eq!(pixels.len(), 48);
        assert!(pixels[..16].iter().all(|v| *v == 1.0) && pixels[16..].iter().all(|v| *v == -1.0));
    }

    #[test]
    fn a_plain_colour_stays_when_shrunk() {
        let picture = Picture { width: 9, height: 17, rgb: [10, 200, 30].repeat(9 * 17) };
        assert_eq!(preprocess().resize(&picture).unwrap().rgb, [10, 200, 30].repeat(16));
    }

    #[test]
    fn wrong_sizes_are_errors() {
        let picture = Picture { width: 8, height: 4, rgb: vec![0; 95] };
        assert!(preprocess().pixels(&picture).unwrap_err().to_string().contains("95"));
        assert!(Preprocess::from_json(r#"{"size":0}"#).unwrap_err().to_string().contains("'size'"));
        assert!(Preprocess::from_json("[").is_err());
    }
}
