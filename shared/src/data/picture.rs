//! Pictures to pixel values, as CLIP's reference processor does it (Pillow bicubic, rounded to u8, centre crop).

use super::resample::resized;
use serde::Deserialize;
use std::borrow::Cow;

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

/// A picture whose shorter edge is no longer is kept as it came, pixels; photos would fill the memory.
const KEPT: usize = 512;

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
    /// Both edges become `shortest_edge`, whatever the proportions.
    pub stretched: bool,
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
    do_resize: Option<bool>,
    do_center_crop: Option<bool>,
    do_rescale: Option<bool>,
    do_normalize: Option<bool>,
    do_pad: Option<bool>,
    resample: Option<u32>,
    rescale_factor: Option<f64>,
}

impl Preprocess {
    /// Read `preprocessor_config.json`; absent keys take CLIP's defaults.
    ///
    /// # Errors
    /// [`PictureError::Config`] names the key.
    pub fn from_json(json: &str) -> Result<Self, PictureError> {
        let raw: Raw = serde_json::from_str(json).map_err(|e| PictureError::Config(e.to_string()))?;
        let fail = |cause: String| Err(PictureError::Config(cause));
        let steps = [
            ("do_resize", raw.do_resize),
            ("do_center_crop", raw.do_center_crop),
            ("do_rescale", raw.do_rescale),
            ("do_normalize", raw.do_normalize),
        ];
        if let Some((key, _)) = steps.iter().find(|(_, on)| *on == Some(false)) {
            return fail(format!("'{key}' is false, supported is CLIP's preprocessing with all its steps"));
        }
        if raw.do_pad == Some(true) {
            return fail("'do_pad' is true, supported is CLIP's preprocessing, which does not pad".into());
        }
        if raw.resample.is_some_and(|r| r != 3) {
            return fail("'resample' must be 3 (bicubic)".into());
        }
        if raw.rescale_factor.is_some_and(|f| (f * 255.0 - 1.0).abs() > 1e-6) {
            return fail("'rescale_factor' must be 1/255".into());
        }
        let stretched = matches!(&raw.size, Some(RawSize::Named { shortest_edge: None, .. }));
        let edge = |size: Option<RawSize>, key: &str| match size {
            None => Ok(224),
            Some(s) => s
                .edge()
                .filter(|n| (1..=4096).contains(n))
                .ok_or_else(|| PictureError::Config(format!("'{key}' must be one edge of 1 to 4096 pixels"))),
        };
        let this = Self {
            shortest_edge: edge(raw.size, "size")?,
            stretched,
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

    /// Width and height after resizing.
    fn target(&self, w: usize, h: usize) -> (usize, usize) {
        let edge = self.shortest_edge;
        let scaled = edge * w.max(h) / w.min(h);
        match (self.stretched, w <= h) {
            (true, _) => (edge, edge),
            (false, true) => (edge, scaled),
            (false, false) => (scaled, edge),
        }
    }

    /// Resized and not yet cropped; not copied where the size is right.
    fn scaled<'a>(&self, picture: &'a Picture) -> Result<Cow<'a, Picture>, PictureError> {
        let (w, h) = (picture.width, picture.height);
        let expected = w * h * 3;
        if expected == 0 || picture.rgb.len() != expected {
            return Err(PictureError::Size { width: w, height: h, expected, found: picture.rgb.len() });
        }
        if w.max(h) / w.min(h) > MAX_ASPECT {
            return Err(PictureError::Resize(format!("{w} x {h} pixels are too narrow; crop it")));
        }
        let (width, height) = self.target(w, h);
        Ok(if (width, height) == (w, h) { Cow::Borrowed(picture) } else { Cow::Owned(resized(picture, width, height)) })
    }

    /// A picture as it is kept: a large one already resized, which [`Self::resize`] then only crops, so the pixels are the same.
    ///
    /// # Errors
    /// As [`Self::resize`].
    pub fn fit(&self, picture: Picture) -> Result<Picture, PictureError> {
        if picture.width.min(picture.height) <= KEPT.max(self.shortest_edge) {
            return Ok(picture);
        }
        Ok(self.scaled(&picture)?.into_owned())
    }

    /// Resize the shorter edge, crop the centre.
    ///
    /// # Errors
    /// [`PictureError`] for a picture whose bytes do not fit its size.
    pub fn resize(&self, picture: &Picture) -> Result<Picture, PictureError> {
        let resized = self.scaled(picture)?;
        let (left, top) = ((resized.width - self.crop) / 2, (resized.height - self.crop) / 2);
        let mut rgb = Vec::with_capacity(self.crop * self.crop * 3);
        for y in top..top + self.crop {
            let start = (y * resized.width + left) * 3;
            rgb.extend_from_slice(&resized.rgb[start..start + self.crop * 3]);
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

    /// Black, white from `corner` on; one channel of what comes out at one size for resizing and cropping.
    fn corner(width: usize, height: usize, corner: (usize, usize), size: usize) -> Vec<Vec<u8>> {
        let rgb = (0..height)
            .flat_map(|y| (0..width).flat_map(move |x| [if x >= corner.0 && y >= corner.1 { 255 } else { 0 }; 3]));
        let picture = Picture { width, height, rgb: rgb.collect() };
        let json = format!(r#"{{"size":{{"shortest_edge":{size}}},"crop_size":{{"height":{size},"width":{size}}}}}"#);
        let preprocess = Preprocess::from_json(&json).unwrap();
        let one: Vec<u8> = preprocess.resize(&picture).unwrap().rgb.iter().step_by(3).copied().collect();
        assert_eq!(preprocess.resize(&preprocess.fit(picture.clone()).unwrap()).unwrap().rgb.len(), size * size * 3);
        one.chunks(size).map(<[u8]>::to_vec).collect()
    }

    /// Pillow's own values; down first and then across is 7 and 11 levels off here.
    #[test]
    fn full_contrast_is_resampled_as_pillow_does() {
        let shrunk = corner(23, 19, (11, 8), 6);
        let expected: [[u8; 6]; 6] = [
            [0; 6],
            [0; 6],
            [0, 0, 0, 79, 121, 121],
            [0, 0, 0, 173, 255, 255],
            [0, 0, 0, 166, 255, 255],
            [0, 0, 0, 166, 255, 255],
        ];
        assert_eq!(shrunk, expected);
        let last = [0, 0, 0, 0, 128, 255, 255, 255];
        let expected: [[u8; 8]; 8] = [
            [0; 8],
            [0; 8],
            [0, 0, 0, 0, 5, 9, 9, 9],
            [0, 0, 0, 0, 93, 186, 186, 186],
            [0, 0, 0, 0, 137, 255, 255, 255],
            last,
            last,
            last,
        ];
        assert_eq!(corner(6, 5, (3, 2), 8), expected);
    }

    #[test]
    fn a_photo_is_kept_small_with_the_same_result() {
        let mut picture = Picture { width: 1301, height: 777, rgb: vec![0; 1301 * 777 * 3] };
        for (i, v) in picture.rgb.iter_mut().enumerate() {
            *v = (i * 7919 % 251) as u8;
        }
        let preprocess = Preprocess::from_json(r#"{"size":336,"crop_size":336}"#).unwrap();
        let kept = preprocess.fit(picture.clone()).unwrap();
        assert_eq!((kept.width, kept.height), (562, 336));
        assert_eq!(preprocess.resize(&kept).unwrap(), preprocess.resize(&picture).unwrap());
    }

    #[test]
    fn other_preprocessing_than_clips_is_refused() {
        for (json, key) in [
            (r#"{"do_resize":false}"#, "do_resize"),
            (r#"{"do_pad":true}"#, "do_pad"),
            (r#"{"resample":2}"#, "resample"),
            (r#"{"rescale_factor":1.0}"#, "rescale_factor"),
        ] {
            assert!(Preprocess::from_json(json).unwrap_err().to_string().contains(key), "{json}");
        }
        assert!(Preprocess::from_json(r#"{"size":{"height":224,"width":224}}"#).unwrap().stretched);
        assert!(
            !Preprocess::from_json(r#"{"size":{"shortest_edge":224},"do_resize":true,"resample":3}"#)
                .unwrap()
                .stretched
        );
    }

    #[test]
    fn wrong_sizes_are_errors() {
        let picture = Picture { width: 8, height: 4, rgb: vec![0; 95] };
        assert!(preprocess().pixels(&picture).unwrap_err().to_string().contains("95"));
        assert!(Preprocess::from_json(r#"{"size":0}"#).unwrap_err().to_string().contains("'size'"));
        assert!(Preprocess::from_json("[").is_err());
    }
}
