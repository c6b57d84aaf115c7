// Which device computes, and why, in plain words. A missing WebGPU is no error: the processor does the same, slower.

const SOFTWARE = /swiftshader|llvmpipe|lavapipe|softpipe|software|basic render|\bwarp\b|\bcpu\b/i;

/** {device: 'cpu' | 'webgpu', words, adapter}; `wanted` is auto, cpu or webgpu. */
export async function chooseDevice(wanted) {
  if (wanted === 'cpu') return cpu('The address asks for the processor (device=cpu).');
  const found = await findAdapter();
  if (wanted === 'webgpu') {
    if (!found.adapter) {
      throw new Error(`The address asks for WebGPU (device=webgpu), but ${found.why}; remove device=webgpu from the address to compute on the processor`);
    }
    const note = found.software ? ' It is emulated on the processor, so it is slow; it was chosen because the address asks for it.' : '';
    return { device: 'webgpu', adapter: found.name, words: `This tab computes with WebGPU on ${found.name}.${note}` };
  }
  if (!found.adapter) return cpu(`No graphics processor for web pages was found: ${found.why}.`);
  if (found.software) return cpu(`No real graphics processor for web pages was found: the browser offers only ${found.name}, which is emulated on the processor.`);
  return { device: 'webgpu', adapter: found.name, words: `This tab computes on the graphics processor (WebGPU): ${found.name}.` };
}

function cpu(reason) {
  return { device: 'cpu', adapter: '', words: `${reason} So this tab computes on the processor (WebAssembly).` };
}

async function findAdapter() {
  if (!globalThis.isSecureContext) {
    return { adapter: null, why: 'browsers offer WebGPU only to pages from localhost or over https, and this page is neither' };
  }
  if (!navigator.gpu) return { adapter: null, why: 'this browser has no WebGPU' };
  let adapter = null;
  try {
    adapter = await navigator.gpu.requestAdapter({ powerPreference: 'high-performance' });
  } catch (e) {
    return { adapter: null, why: `the browser refused WebGPU (${e.message})` };
  }
  if (!adapter) return { adapter: null, why: 'the browser found no graphics processor that its WebGPU supports' };
  const info = adapter.info ?? {};
  const parts = [info.description, info.vendor, info.architecture, info.device].filter(Boolean);
  const software = Boolean(info.isFallbackAdapter ?? adapter.isFallbackAdapter) || parts.some((p) => SOFTWARE.test(p));
  return { adapter, software, name: info.description || parts.join(' ') || 'an unnamed graphics processor' };
}

/** "Measured 31 GFLOP/s: about 900 pictures a second." */
export function speedWords(gflops, pictureFlops) {
  const speed = gflops >= 100 ? Math.round(gflops) : gflops.toFixed(1);
  if (!pictureFlops) return `Measured ${speed} GFLOP/s.`;
  const each = (gflops * 1e9) / pictureFlops;
  const count = each >= 10 ? String(Number(each.toPrecision(2))) : each.toFixed(1);
  return `Measured ${speed} GFLOP/s: about ${count} pictures a second to prepare, once; training steps on them are lighter.`;
}

/** For the operator's table. */
export function deviceText(choice, gflops) {
  const speed = `${gflops.toFixed(gflops < 100 ? 1 : 0)} GFLOP/s`;
  return choice.device === 'cpu' ? `processor (WebAssembly), ${speed}` : `WebGPU: ${choice.adapter.slice(0, 60)}, ${speed}`;
}
